"""Training, the only owner of time: steps, schedules, optimiser, checkpoints.

`stage` holds a recipe's stages as data, `loop` runs one training, `step` is all that one step needs, `estimate` times a few of them.
`teacher` caches the teacher's outputs, `runstate` what a killed run needs, `devices` chooses where and how precisely to compute,
`embedding_gradient` keeps the gradient of the word table.
"""
