"""The command line, `codegemma VERB`: main.py lists the verbs, the other files define them."""
