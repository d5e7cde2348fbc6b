"""Forgets what a process has measured, proven and warned of, as a new one has it."""

from segfast.ops import _backend, _choice, _choice_files, _gpu, _proofs


def forget() -> None:
    """Read choices and proofs anew at their next use, and warn anew."""
    _choice_files._warn_once.cache_clear()
    _backend.CHOSEN.clear()
    _choice.forget_choices()
    _gpu.forget()
    _proofs.forget()
