"""ReMix inside other people's training programs."""
