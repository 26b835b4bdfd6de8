"""Every error that neuroscope raises on purpose, and nothing else.

    NeuroscopeError        catch this to catch them all
    ├── ConfigError        (ValueError) an option, label file or calibration that cannot be used
    │   └── LockError      a lock file that is damaged, or is not what was asked or is there
    ├── SAEError           (ValueError) an SAE that is missing, damaged, unknown or does not fit
    ├── EngineError        an engine did not start, or failed while it ran
    ├── ServerError        a running server refused something, or does not answer
    └── DownloadError      the Hugging Face hub did not give something, or did not take it
        ├── GatedError          its terms were not accepted
        ├── NoRepositoryError   there is none of that name, or it is private
        ├── NoRevisionError     the repository has no such branch, tag or commit
        ├── NoFileError         the repository has no such file
        ├── UnreachableError    no network, or offline on purpose, or the hub is down
        ├── NotLoggedInError    there is no token, or one that is not valid
        ├── NotAllowedError     the token may not do that
        └── DiskFullError       what was fetched does not fit

A message is one sentence: what was asked, the value, why not, and what to do instead. Users see it
as it stands, without a traceback.
"""


class NeuroscopeError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConfigError(NeuroscopeError, ValueError):
    """Something that the user chose cannot be used."""


class LockError(ConfigError):
    """A lock file is damaged, or says something else than what was asked or is there."""


class SAEError(NeuroscopeError, ValueError):
    """An SAE is missing, damaged, of an unknown kind, or does not fit the model."""


class EngineError(NeuroscopeError):
    """An engine did not start, or failed while it ran."""


class ServerError(NeuroscopeError):
    """A running server refused something, does not answer, or is something else.

    Attributes:
        status: Of its HTTP answer; None: there was none.
        param, code: As in OpenAI's error object, what the server says of the reason.
    """

    def __init__(
        self,
        message: str,
        status: int | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


class DownloadError(NeuroscopeError):
    """Something could not be fetched from the Hugging Face hub, or be written to it."""


class GatedError(DownloadError):
    """The terms of a gated repository were not accepted."""


class NoRepositoryError(DownloadError):
    """There is no repository of that name that the user may see."""


class NoRevisionError(DownloadError):
    """The repository has no such branch, tag or commit."""


class NoFileError(DownloadError):
    """The repository has no such file."""


class UnreachableError(DownloadError):
    """The hub does not answer or was not asked (HF_HUB_OFFLINE), and the cache has it not."""


class NotLoggedInError(DownloadError):
    """There is no token, or the hub does not know it."""


class NotAllowedError(DownloadError):
    """The account or its token may not do that."""


class DiskFullError(DownloadError):
    """No room for what was fetched."""
