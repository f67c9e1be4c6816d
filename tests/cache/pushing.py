"""A tier's push and a layer's commit in tests, where most of their contexts are the same."""

from jaxinfer.cache.context import CommitContext, PushContext


def pushing(n_in, count, after, **more) -> PushContext:
    """The context of a push into the first tier of a row."""
    return PushContext(n_in=n_in, count=count, after=after, length=n_in, **more)


def committing(length, count, after, accepted=None) -> CommitContext:
    """The context of a commit of the first tokens, or of those accepted."""
    return CommitContext(length=length, accepted=accepted, count=count, after=after)
