"""POST /orders stores an order, and the mail that must follow it, in one transaction."""

from django.db import connection, transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path
from django.views.decorators.http import require_POST

from outwake import enqueue
from shop.models import Order


@require_POST
@transaction.atomic
def order(request: HttpRequest) -> JsonResponse:
    """The mail will be sent if the order is there, and only then."""
    placed = Order.objects.create(article=request.POST["article"])
    row_id = enqueue(connection, "email.send", {"article": placed.article})
    return JsonResponse({"order": placed.pk, "row": row_id}, status=201)


urlpatterns = [path("orders", order)]
