"""`peft-mask`: commands for adapters on disk. Each reads what it is given, calls the rooms below, and prints."""
