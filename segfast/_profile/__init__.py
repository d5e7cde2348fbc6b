"""`segfast.profile`: how long each layer of a model takes, and how far that is from the device's rates."""
