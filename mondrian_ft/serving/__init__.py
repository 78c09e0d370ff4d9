"""Local pages and services over HTTP."""
