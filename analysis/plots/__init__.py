"""The figures: what is drawn, from records or weights; the commands plot_*.py read those and call this."""
