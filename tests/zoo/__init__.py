"""Networks in the shapes of public codebases, written anew; each names the class whose shape it has."""
