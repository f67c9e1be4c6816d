"""Training: texts and their held-out split, token windows, optimisers and one generic Optax loop.

Nothing here is imported by `import jaxinfer`; trainable add-ons (drafters, predictors, LESS
feature maps) bring their own loss and use `jaxinfer.train.loop.fit`.
"""
