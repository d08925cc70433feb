from shrink.metrics import *  # noqa: F403
