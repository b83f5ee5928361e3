"""Architecture search: on one task, from tables, and over many tasks."""
