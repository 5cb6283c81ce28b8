"""The tables of a study, of any recipe and size: its cells, its settings, its runs."""
