"""Training with Lightning: the classifier, its schedule, and the runs of a sweep."""
