"""Many adapters from one base: which of them are in memory, which in the model, and who is using them."""
