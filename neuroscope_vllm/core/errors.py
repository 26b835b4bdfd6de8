"""Every error that neuroscope raises on purpose, and nothing else.

    NeuroscopeError        catch this to catch them all
    ├── ConfigError        (ValueError) an option, label file or calibration that cannot be used
    ├── SAEError           (ValueError) an SAE that is missing, damaged, unknown or does not fit
    └── DownloadError                   the hub did not give a file

A message is one sentence: what was asked, the value, why not, and what to do instead. Users see it
as it stands, without a traceback.
"""


class NeuroscopeError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(NeuroscopeError, ValueError):
    """Something that the user chose cannot be used."""


class SAEError(NeuroscopeError, ValueError):
    """An SAE is missing, damaged, of an unknown kind, or does not fit the model."""


class DownloadError(NeuroscopeError):
    """A file could not be fetched from the Hugging Face hub."""
