"""Training with Lightning: the classifier, its schedule, and the rows of a sweep."""
