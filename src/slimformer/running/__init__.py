"""The one corridor: request -> preflight -> run -> bundle -> stages -> candidate -> rivals -> measure -> deliver.

`recipe`, `reader` and `order` say what to do, `preflight` refuses mistakes, `prepare` and `stages` make the model (`bundle` holds the
nouns), `exports`, `trials`, `candidate` and `rescue` its files, `rivals`, `facts` and `delivery` the comparison and the folder.
`runner` carries out a recipe's stages, `search` stages that it proposes; `bench` compares folders that exist already.
"""
