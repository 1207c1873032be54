"""The paper's analyses and claims on a real model: a command, a result and a picture each."""
