"""Ray actors and the plumbing around them: where the work runs.

One file per kind of work, each a thin actor over the library; `cluster` starts or joins Ray, `pool`
drives actors, `events` carries progress and log lines back to the driver. Nothing here knows Prefect.
"""
