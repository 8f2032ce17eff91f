"""Parsers of flags and of the fields on the command line: `None` is no text, and the last of several values counts."""

import ast
import re
from typing import Any

from absl import flags
from ml_collections import config_flags

NONE = "None"
flags.disclaim_key_flags()  # a flag belongs to the module that has it defined


class OrNone(flags.ArgumentParser):
    """Parses `None` as None, and leaves any other text to another parser.

    Example:
      >>> parser = OrNone(flags.IntegerParser())
      >>> parser.parse("7"), parser.parse("None")
      (7, None)
    """

    def __init__(self, parser: flags.ArgumentParser):
        self._parser = parser
        self.syntactic_help = parser.syntactic_help

    def parse(self, argument: Any) -> Any:
        return None if argument in (None, NONE) else self._parser.parse(argument)

    def flag_type(self) -> str:
        return self._parser.flag_type()


class TupleParser(flags.ArgumentParser):
    """Parses a Python tuple, one element of it, or names with commas.

    Not that of ml_collections, which joins the tuples of a flag that is given twice.

    Example:
      >>> TupleParser().parse("(16, 8)"), TupleParser().parse("16"), TupleParser().parse("wandb,mlflow")
      ((16, 8), (16,), ('wandb', 'mlflow'))
    """

    def parse(self, argument: Any) -> tuple:
        if isinstance(argument, str):
            if re.fullmatch(r"[a-z]+(,[a-z]+)*", argument):
                return tuple(argument.split(","))
            try:
                argument = ast.literal_eval(argument)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError) as error:
                raise ValueError(f"{argument[:60]!r} is no tuple, such as (256, 256)") from error
        return tuple(argument) if isinstance(argument, tuple | list) else (argument,)

    def flag_type(self) -> str:
        return "tuple"


_PARSERS = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    str: flags.ArgumentParser(),
    tuple: TupleParser(),
}


def register() -> None:
    """Has config flags parse fields so. A field that cannot be None is refused by `config.validate`, by its name."""
    for kind, parser in _PARSERS.items():
        config_flags.register_flag_parser_for_type(kind, OrNone(parser))


def define_optional(name: str, kind: type, help_text: str, flag_values: flags.FlagValues = flags.FLAGS, **limits):
    """Defines a flag that is None unless a value is given.

    Args:
      name: of the flag.
      kind: int, float or str.
      help_text: its documentation.
      flag_values: where it is defined.
      **limits: lower_bound and upper_bound of a number.

    Returns:
      The holder of its value.
    """
    parsers = {int: flags.IntegerParser, float: flags.FloatParser, str: flags.ArgumentParser}
    parser = OrNone(parsers[kind](**limits))
    return flags.DEFINE(parser, name, None, help_text, flag_values, flags.ArgumentSerializer())
