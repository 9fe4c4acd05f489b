"""Keeps libraries quiet while a model is loaded. Stands alone."""

import contextlib
import logging
import sys
import warnings


class HubSilence(logging.Filter):
    """Drops what is logged. That the Hugging Face hub does not answer is said, once."""

    said = False

    def filter(self, record):
        if not self.said and record.getMessage().startswith("Retrying in"):
            self.said = True
            print(
                "the Hugging Face hub does not answer, trying again (HF_HUB_OFFLINE=1: what was "
                "downloaded before, at once)",
                file=sys.stderr,
                flush=True,
            )
        return False


@contextlib.contextmanager
def quiet_libraries():
    """While a model is loaded: nothing that a library logs or warns of is shown. What matters is in
    its exceptions, or is checked by whoever loads."""
    logging.basicConfig()  # open_clip's first warning would do this, after handlers were looked for
    handlers = []
    for name in (None, "huggingface_hub", "transformers"):
        handlers += logging.getLogger(name).handlers
    silence = HubSilence()
    for handler in handlers:
        handler.addFilter(silence)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(silence)
