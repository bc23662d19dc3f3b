"""Every exception the project raises on purpose.

MementoError
├── ConfigError           an option, file or flag combination that cannot work (ValueError)
│   └── MarkerError       a marker string that is not exactly one token of the tokenizer
├── RequestError          a per-request option that cannot work: HTTP 400 (ValueError)
├── ServerError           a server that refused a request or broke an answer off
├── PatchError            a seam of SGLang that is missing, changed or not wrapped
├── DataError             an input row, file or checkpoint that cannot be used (ValueError)
└── PipelineError         work on many rows: `memento convert` and its stages, `memento batch`
    ├── StoreError        the work folder is locked, damaged or made with other settings
    ├── EndpointError     an LLM endpoint refused or failed for good
    │   └── RefusedError  it refused this one request (too long, filtered); others may go on
    ├── AnswerError       an LLM answered, several times, but never usably
    └── StoppedError      the run ended early and can be resumed (budget, Ctrl-C, endpoint down)
"""


class MementoError(Exception):
    """Base of all errors that are meant for the user; the message says what to change."""


class ConfigError(MementoError, ValueError):
    pass


class MarkerError(ConfigError):
    pass


class RequestError(MementoError, ValueError):
    pass


class ServerError(MementoError):
    pass


class PatchError(MementoError):
    pass


class DataError(MementoError, ValueError):
    pass


class PipelineError(MementoError):
    pass


class StoreError(PipelineError):
    pass


class EndpointError(PipelineError):
    pass


class RefusedError(EndpointError):
    pass


class AnswerError(PipelineError):
    pass


class StoppedError(PipelineError):
    pass
