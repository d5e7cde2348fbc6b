"""`segfast.profile`: how long each layer of a model takes, and how far that is from what the device can do."""
