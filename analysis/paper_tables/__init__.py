"""The tables of the papers: what is printed, beside what is counted, measured and recorded here."""
