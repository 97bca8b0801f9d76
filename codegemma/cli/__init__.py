"""The command line: `codegemma VERB`, one function for each verb."""
