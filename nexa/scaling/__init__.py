"""What a run will need and take, before anything is allocated; knows neither the loop nor the engine."""
