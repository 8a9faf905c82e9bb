"""The cache API that transformers removed, restored on demand, so that old models run again.

    with mnemon.legacy.enable():
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        model.generate(**inputs)

`enable` adds to transformers' classes what is missing in the installed release, for its own caches
and for mnemon's; `disable` takes every addition back and leaves transformers as it was. Where an
old name is still there with another meaning, the caller decides: code of transformers, torch,
accelerate, peft and mnemon gets today's meaning, all other code (remote modeling files, scripts)
the old one. Each name warns once, with what to write today. See docs/legacy.md.

Both act on the whole process, on all threads at once: switch before threads start.
"""

from typing import TYPE_CHECKING

from mnemon.legacy.warning import LegacyWarning

if TYPE_CHECKING:
    from mnemon.legacy.switch import Enabled, Switch

__all__ = ["LegacyWarning", "disable", "enable", "is_enabled"]


def enable() -> "Enabled":
    """Restore the removed names, until `disable` or the end of a ``with`` block.

    Calls are counted: after two of them two `disable` (or ends of blocks) are needed.

    Returns:
        A context manager that undoes this call, also when its block raises.
    """
    return _switch().enable()


def disable() -> None:
    """Undo one `enable`; the last one leaves transformers exactly as it was found.

    Raises:
        MnemonError: nothing is enabled.
    """
    _switch().disable()


def is_enabled() -> bool:
    """Whether the removed names are there now."""
    return _switch().is_enabled


def _switch() -> "Switch":
    # torch and transformers are imported when the switch is first touched.
    from mnemon.legacy.switch import SWITCH

    return SWITCH
