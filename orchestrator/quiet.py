"""Libraries that talk while the user reads our own lines."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Silence progress bars and advice of the model libraries; call before importing them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # peft asks transformers by a name that transformers has renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    import transformers

    transformers.utils.logging.disable_progress_bar()
