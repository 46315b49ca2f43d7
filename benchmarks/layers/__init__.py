"""One adapted linear: the shapes it is measured at, its tensors, and what it is held to."""
