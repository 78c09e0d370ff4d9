"""Answers to held-out photographs, and what can be said of them: measures and a verdict."""
