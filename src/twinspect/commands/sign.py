"""``twinspect sign``: a signature beside a model, made or verified."""

from __future__ import annotations

from twinspect import signature
from twinspect.commands.options import SignOptions
from twinspect.console import Console
from twinspect.errors import ConfigError


def sign(options: SignOptions, console: Console) -> None:
    """Sign a model with --key, or verify it with --check.

    Raises:
        ConfigError: both of them, or neither.
    """
    if options.key is not None and options.check is None:
        signature.sign(options.model, options.key)
        console.say(f"signed {options.model}")
    elif options.check is not None and options.key is None:
        signature.verify(options.model, options.check)
        console.say(f"{options.model} is as the holder of {options.check} signed it")
    else:
        raise ConfigError("give --key KEY to sign, or --check KEY to verify")
