"""Records to tables, figures and one page; nothing is measured here."""
