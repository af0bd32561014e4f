"""What runs, when, with which parameters: recipes, Prefect flows and the `sparsemill` command."""
