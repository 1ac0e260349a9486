"""What runs have shown, as tables, pictures and a page."""
