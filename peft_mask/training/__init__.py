"""How scores move: optimizer, budgets that grow, the callback for `Trainer`, what a training takes."""
