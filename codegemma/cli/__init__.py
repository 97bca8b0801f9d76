"""The command line, `codegemma VERB`. main.py lists the verbs; the other files have a function for each."""
