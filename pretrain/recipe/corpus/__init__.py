"""Raw files to clean documents: stages 01 and 02."""
