"""Where the zeros of a language model belong: modules, budgets and candidates, and what a training forgets."""
