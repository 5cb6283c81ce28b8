"""Training with Lightning: the classifier, its schedule, and the rows of a sweep."""

import os

# torch reads this when it makes its first tensor, which the imports below this package already do. A training step on a
# CPU takes its memory anew from the system each time; in huge pages, where Linux has them on request, that is far
# cheaper. A value of the user's own is kept: THP_MEM_ALLOC_ENABLE=0 turns them off.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
