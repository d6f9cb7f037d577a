"""What people look at: pages, figures, tables, text, annotations for CI."""
