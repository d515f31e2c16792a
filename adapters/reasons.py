"""Why an adapter is not loaded, as codes that clients may rely on."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum

from ..core.errors import NotFound, Refused

_PARAM = "adapter"


class Reason(StrEnum):
    """The `code` of every refusal of an adapter."""

    PATH_FORBIDDEN = "adapter_path_forbidden"
    """Outside the root, through a link, or no regular file."""
    PATH_NOT_FOUND = "adapter_path_not_found"
    PICKLE = "adapter_pickle_unsupported"
    FILE_TOO_LARGE = "lora_adapter_file_too_large"
    TENSOR_LIMIT = "lora_tensor_limit_exceeded"
    RANK_LIMIT = "lora_rank_limit_exceeded"
    """The rank that would be multiplied, which for some methods is a product of ranks."""
    BYTE_LIMIT = "lora_byte_limit_exceeded"
    CONFIG_INVALID = "adapter_config_invalid"
    FIELD_UNKNOWN = "adapter_field_unknown"
    """A field of the config that is set and has no known meaning."""
    METHOD_UNSUPPORTED = "adapter_method_unsupported"
    OPTION_UNSUPPORTED = "adapter_option_unsupported"
    INIT_CONVERSION_REQUIRED = "init_conversion_required"
    """Training began by changing the base in a way that cannot be repeated."""
    PATTERN_UNSAFE = "adapter_pattern_unsafe"
    """A regular expression that could take very long."""
    WEIGHTS_INVALID = "adapter_weights_invalid"
    MODULE_UNKNOWN = "adapter_module_unknown"
    MODULE_REPLACED = "adapter_module_replaced"
    """A whole linear or norm of the file's own."""
    TARGET_MISMATCH = "adapter_target_mismatch"
    """Config and tensors name different modules."""
    TENSOR_MISSING = "adapter_tensor_missing"
    TENSOR_REPEATED = "adapter_tensor_repeated"
    TENSOR_UNUSED = "adapter_tensor_unused"
    SHAPE_MISMATCH = "adapter_shape_mismatch"
    RANK_MISMATCH = "adapter_rank_mismatch"
    NOT_FINITE = "adapter_not_finite"
    IDS_INVALID = "adapter_token_ids_invalid"
    TABLE_CONFLICT = "adapter_table_conflict"
    """Two changes of the embedding, or of the head, whose order no file states."""
    EMPTY = "adapter_empty"


def refused(reason: Reason, message: str) -> Refused | NotFound:
    """The error for an adapter that is not loaded."""
    kind = NotFound if reason is Reason.PATH_NOT_FOUND else Refused
    return kind(message, param=_PARAM, code=reason.value)


@contextmanager
def refusing(reason: Reason, names: Mapping[str, str] | None = None) -> Iterator[None]:
    """Refuse for `reason` what the readers of checkpoints refuse in the block.

    In what they say, each of `names` is put in the other's place.
    """
    try:
        yield
    except Refused as error:
        if error.param == _PARAM:
            raise
        message = error.message
        for ours, theirs in (names or {}).items():
            message = message.replace(ours, theirs)
        raise refused(reason, message) from None
    except (RecursionError, OverflowError) as error:
        raise refused(reason, f"JSON beyond what can be read: {error}") from None
