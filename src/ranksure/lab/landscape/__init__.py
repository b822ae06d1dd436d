"""Where random starts end: known instances, a census of the ends, its figure."""
