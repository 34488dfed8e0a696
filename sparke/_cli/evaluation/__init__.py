"""`sparke eval`: folders of pictures measured, as a table and a report that explains itself."""
