"""What the routers' estimators cost and buy: one file for each part of `bench_estimators`."""
