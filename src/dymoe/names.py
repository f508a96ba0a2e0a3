"""Names from data: which may name a task and so its expert group, its files and its folders.

A task's name becomes the name of a PEFT adapter, a key of torch's ParameterDict, a part of file names and a key of JSON
files. What one of these cannot carry, or carries in silence to another place, is refused where the name enters.
"""

import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from dymoe.errors import DymoeError
from dymoe.messages import brief

CHARACTERS, BYTES = 64, 200  # a file's name has 255 bytes, its number and ending included
RIGHT = "use letters, digits, spaces, '-' and '_', for example 'birds'"
# A group is a key of ParameterDicts, which keep their entries as attributes beside these.
_ATTRIBUTES = """
T_destination add_module apply bfloat16 buffers call_super_init children clear compile copy cpu cuda double dump_patches
eval extra_repr float forward fromkeys get get_buffer get_extra_state get_parameter get_submodule half ipu items keys
load_state_dict modules mtia named_buffers named_children named_modules named_parameters parameters pop popitem
register_backward_hook register_buffer register_forward_hook register_forward_pre_hook register_full_backward_hook
register_full_backward_pre_hook register_load_state_dict_post_hook register_load_state_dict_pre_hook register_module
register_parameter register_state_dict_post_hook register_state_dict_pre_hook requires_grad_ set_extra_state
set_submodule setdefault share_memory smart_apply state_dict to to_empty train training type update values xpu
zero_grad
"""
ATTRIBUTES = frozenset(_ATTRIBUTES.split())
PREFIX = "dymoe_"  # of the parameters that belong to groups
WRAPPERS = ("base_model", "model", "base_layer")  # parts of every wrapped model's parameter names


def safe_name(
    name: object, what: str = "name", others: Iterable[str] = (), parts: Mapping[str, str] | None = None
) -> str:
    """Return a name from data if it can name an expert group, a file and a folder.

    Args:
        name: what the data say.
        what: where it stands, for the message.
        others: names beside it; one that differs by case or Unicode form alone would be the same file on many systems.
        parts: what the names of the model's parameters consist of, see `parts_of`.

    Raises:
        DymoeError: the name cannot be used; the message says why and what would be right.
    """
    if not isinstance(name, str):
        raise DymoeError(f"{what}: {brief(name)}: expected a text; {RIGHT}, in quotes where YAML reads something else")
    same = next((other for other in others if fold(other) == fold(name)), None)
    fault = _fault(name)
    if fault is None and same is not None:
        fault = "it is there twice" if same == name else f"it differs from {same!r} by case or Unicode form alone"
    if fault is None and parts is not None and name in parts:
        fault = f"it is a part of the model's own names ({parts[name]}), and PEFT would leave tensors out of files"
    if fault is not None:
        raise DymoeError(f"{what}: {brief(name)}: {fault}; {RIGHT}")
    return name


def safe_names(names: Iterable[object], what: str = "name", parts: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """`safe_name` for names that stand beside one another.

    Raises:
        DymoeError: as `safe_name`, for the first one.
    """
    safe: list[str] = []
    for name in names:
        safe.append(safe_name(name, what, safe, parts))
    return tuple(safe)


def free_name(name: str, others: Iterable[str]) -> str:
    """`name`, with underscores behind it until none of the others is the same name."""
    folded = {fold(other) for other in others}
    while fold(name) in folded:
        name += "_"
    return name


def fold(name: str) -> str:
    """What is equal for names that a file system may take for one: same letters, whatever their case and form."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def parts_of(model: Any) -> dict[str, str]:
    """The parts between the dots of a torch module's parameter names, each with a name that has it.

    PEFT tells the tensors of groups apart by such parts: it leaves out of a group's file what has the name of another
    group between two dots. Names of groups that the model already has are no such parts.
    """
    parts: dict[str, str] = {}
    for key in model.state_dict():
        *path, last = key.split(".")
        for part in path if path and path[-1].startswith(PREFIX) else (*path, last):
            parts.setdefault(part, key)
    return parts


def _fault(name: str) -> str | None:
    """Why a text cannot be used wherever it stands, or None."""
    if not name:
        return "it is empty"
    if not name.isprintable():
        return "it has characters that cannot be shown (a control character, a line end, half a surrogate pair)"
    if any(character in name for character in "/\\."):
        return "it has a '/', '\\' or '.', which part paths and the names of parameters"
    if not name[0].isalnum() or name != name.strip():
        return "it must begin with a letter or a digit and not end in a space"
    if name.isdigit():
        return "it has digits alone, as the layers of a model do"
    size = len(name.encode())
    if len(name) > CHARACTERS or size > BYTES:
        return f"it has {len(name)} characters ({size} bytes), at most {CHARACTERS} ({BYTES}) are allowed"
    if name in ATTRIBUTES:
        return "it is an attribute of torch's modules and dictionaries"
    if name in WRAPPERS or name.startswith(PREFIX):
        return "it is a part of every wrapped model's parameter names"
    return None
