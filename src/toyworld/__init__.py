"""A small drawn world in which captions, questions, stories and boxes are known exactly."""
