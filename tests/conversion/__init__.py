"""Other people's DenseNets, converted."""
