"""What people look at: the report page, its plots, and the tables in the terminal."""
