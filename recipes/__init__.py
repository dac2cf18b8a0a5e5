"""Recipes: what of the papers can be seen in miniature on small real data, one command a row of docs/reproduction.md.

    python -m recipes.ers_rejection            # stored embeddings, seconds
    python -m recipes.low_resolution           # trains, minutes; paired seeds
    python -m recipes                          # the table of the stored results

They use public names of recog_fast only. Each prints its measurements and gates, stores them in recipes/results/ and
exits with status 1 where a gate is not met. Data: RECOG_FAST_DATA, or ../shared/data beside the checkout.
"""
