"""Keeps libraries quiet while a model is loaded. Stands alone."""

import contextlib
import logging
import sys
import warnings


class HubSilence(logging.Filter):
    """Drops what is logged. That a file is asked of the Hugging Face hub again is said, once."""

    said = False

    def filter(self, record):
        if not self.said and record.getMessage().startswith(("Retrying in", "Rate limited")):
            self.said = True
            print(
                "the Hugging Face hub did not give a file, trying again (HF_HUB_OFFLINE=1: what "
                "was downloaded before, at once)",
                file=sys.stderr,
                flush=True,
            )
        return False


@contextlib.contextmanager
def quiet_libraries():
    """While a model is loaded: nothing that a library logs or warns of is shown. What matters is in
    its exceptions, or is checked by whoever loads."""
    # Makes the root logger's handler now, so that it gets the filter, too. Otherwise open_clip's
    # first warning would make it.
    logging.basicConfig()
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
