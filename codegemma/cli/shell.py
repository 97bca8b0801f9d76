"""The script by which bash completes our command line; typer has those of other shells."""

from __future__ import annotations

from typer import _completion_shared

# It differs from typer's own in two things. A ~ at the start of the command, which the shell has not replaced
# yet, is replaced; and errors are dropped, since they would be printed into the line that is being typed.
BASH = """
%(complete_func)s() {
    local IFS=$'\\n' program=$1
    [[ $program == '~/'* ]] && program=$HOME/${program:2}
    COMPREPLY=( $( env COMP_WORDS="${COMP_WORDS[*]}" \\
                   COMP_CWORD=$COMP_CWORD \\
                   %(autocomplete_var)s=complete_bash "$program" 2>/dev/null ) )
    return 0
}

complete -o default -F %(complete_func)s %(prog_name)s
"""


def prepare() -> None:
    """Gives typer our script for bash."""
    _completion_shared._completion_scripts["bash"] = BASH
